"""Finds attention in a captured ATen graph and proves what it is: anchors, score chain, mask algebra, layouts."""
