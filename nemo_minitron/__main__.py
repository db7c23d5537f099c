"""`python -m nemo_minitron`."""

from nemo_minitron.cli.main import main

if __name__ == "__main__":
    main()
