"""Models that compute from packed weights: the modules, the operations, the way in through
transformers. Empty of imports, as `import cptq` must stay light; see `registration`."""
