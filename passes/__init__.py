"""dyncomp.passes; see the docstring of each module."""

# The folder stands at the top level of the repository but is the package `dyncomp.passes`: imported under another
# name it would be a second copy of every class (and PyPI has a `backends` of its own).
if __name__ != "dyncomp.passes":
    raise ImportError(f"import this package as dyncomp.passes, not as {__name__!r}")
