"""Expert computation over a layout: one product per expert, and a layer of experts."""
