"""`python -m pipeline`: what torchrun workers start."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
