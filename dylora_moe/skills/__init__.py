"""What each expert is good at: samples of its text in numbers, for the fit of the router and for novelty."""
