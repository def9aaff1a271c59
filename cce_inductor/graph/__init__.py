"""The compiler pass: finds linear cross-entropies in FX graphs and rewrites them. It knows graphs, not kernels."""
