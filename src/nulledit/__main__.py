"""`python -m nulledit`, as `torchrun -m nulledit` starts it."""

from nulledit.cli.main import main

if __name__ == "__main__":
    main()
