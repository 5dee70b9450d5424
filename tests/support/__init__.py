"""What tests share: sample inputs, strategies, tolerances, compile checks."""
