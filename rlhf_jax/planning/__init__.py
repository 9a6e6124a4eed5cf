"""What a program will take on chips that are not there.

chips        figures of chips, each with its source
topologies   names of slices -> devices to compile for
flops        matmuls of a model, counted from its config
collectives  bytes that chips send one another, read from compiled text
memory       bytes a chip, from the compiler; its refusals with their numbers
roofline     the shortest time that all of this can take
cache        what was compiled once is not compiled again
"""
