"""One image under inspection: values of it, computed once for all who read them."""
