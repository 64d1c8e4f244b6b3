"""What a layout is for: one product an expert, and a layer of experts."""
