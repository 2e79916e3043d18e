"""Documents to rows: which tokens lie in row r of epoch e, end to end (`stream`) or whole (`whole_documents`)."""
