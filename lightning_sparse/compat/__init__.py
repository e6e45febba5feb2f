"""What the package is built on: Lightning's two names, corners of torch, extras, checks of arguments."""
