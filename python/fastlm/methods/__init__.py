"""Training and compression methods, one folder per paper; import the one you use: `from fastlm.methods import rho1`."""
