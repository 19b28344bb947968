"""`python -m llmtune` is `llmtune`."""

from llmtune.cli.main import main

if __name__ == "__main__":
    main()
