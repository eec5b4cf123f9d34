"""whet: a trained PyTorch network goes in; a smaller, faster, proven one comes out."""
