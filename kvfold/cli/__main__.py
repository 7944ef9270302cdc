"""`python -m kvfold.cli` is the command line too."""

from kvfold.cli.main import main

if __name__ == "__main__":
    main()
