"""`python -m cptq`."""

from cptq.cli.app import main

if __name__ == "__main__":
    main()
