"""The two toy problems of the paper's Table 1: many random starts trained as one batch; search, counts, figures."""
