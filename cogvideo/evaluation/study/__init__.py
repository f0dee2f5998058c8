"""Human studies: a page on which raters compare clips of two systems, and the analysis of their votes."""
