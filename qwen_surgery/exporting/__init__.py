"""Export: one weight-free trace per kind of net, bound to where each layer's weights lie."""
