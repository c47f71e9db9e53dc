"""python -m fastconv: the same command as the console script."""

from fastconv.cli import main

if __name__ == "__main__":
    main(prog_name="fastconv")
