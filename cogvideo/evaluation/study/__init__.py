"""Human studies: a page on which raters compare two systems' clips, and what their votes say."""
