"""`python -m llmtune` is `llmtune`, also where no console script is on the path."""

from llmtune.cli.main import main

main()
