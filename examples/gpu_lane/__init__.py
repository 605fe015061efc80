"""The 200-epoch protocol on one GPU: students side by side, a step as one CUDA graph, data and views on the device."""
