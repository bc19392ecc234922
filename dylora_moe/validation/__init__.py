"""The checks of the three scripts, and how they are reported."""
