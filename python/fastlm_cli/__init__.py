"""The `fastlm` command. No torch or fastlm import before a command runs: help and completion are instant."""
