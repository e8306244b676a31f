"""``lvrpo reproduce``: a declared table of evidence, run, resumed and tabulated job by job."""
