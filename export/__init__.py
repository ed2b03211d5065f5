"""Workshop: trained weights become a bundle. Not part of the installed package."""
