"""Inference from packed weights: modules, operations, and transformers' quantizer interface.

This file imports nothing, so that `import cptq` stays fast; see `registration`.
"""
