"""`fastlm demo`: a model trained in minutes, beside gzip, xz and plain PyTorch, with a panel and a report."""
