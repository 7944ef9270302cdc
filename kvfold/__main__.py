"""`python -m kvfold` is the command line."""

from kvfold.cli.main import main

if __name__ == "__main__":
    main()
