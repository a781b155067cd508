"""The `.beton` file and its manifest: layout, ranges, reader, merge and subset, stage. No torch, ray, ffcv."""
