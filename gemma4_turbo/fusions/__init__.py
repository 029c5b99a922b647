"""One kernel in the place of a run of stock's calls: may it, does it agree, eager or traced."""
