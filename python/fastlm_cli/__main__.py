"""`python -m fastlm_cli` is the `fastlm` command."""

from fastlm_cli.main import run

run()
