"""What an export copies beside its weights: files for PyTorch that stand alone and import nothing of this package."""
