"""Dual-energy pairs with exact truth, projected from CT volumes (digitally reconstructed radiographs)."""
