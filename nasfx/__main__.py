"""`python -m nasfx`: the command line."""

from nasfx.cli import app

if __name__ == "__main__":
    app(prog_name="nasfx")
