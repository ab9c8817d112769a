"""The pictures of the book. One module per chapter, in pairs of functions:

`..._data()` computes the numbers, from the annotated modules, and returns them for the
tests; `draw_...(data)` draws them and returns a matplotlib Figure.
"""
