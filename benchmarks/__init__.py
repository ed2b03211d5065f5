"""Workshop: comparisons with peers and recorded results. Not part of the installed package."""
