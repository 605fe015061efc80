"""Where DiSK helps: problems, stacked students, cells of the map, its rule and its figures."""
