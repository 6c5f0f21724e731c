"""`python -m megalign`: kept thin, because a spawned helper process imports it again."""

from megalign.cli import main

if __name__ == "__main__":
    main()
