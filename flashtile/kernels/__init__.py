"""What the kernels of all backends written in Triton share: the words of their arguments, where tiles lie, and what
happens to scores. Gluon kernels call the same functions."""
