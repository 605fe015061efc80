"""Where DiSK pays: problems, students that train stacked, cells of the map, its rule and its figures."""
