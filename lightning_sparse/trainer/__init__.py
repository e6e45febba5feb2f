"""Lightning's hooks, and what a fit refuses, tells and remembers."""
