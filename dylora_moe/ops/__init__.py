"""Operations that PyTorch does not have: of a loss, and of frozen layers in half precision on CPUs."""
