"""The engine alone moves data: hooks on instances (`hooks`), the reduction of a
prompt (`plan`), masks and positions (`sequence`), a cache that knows two
lengths (`cache`), signals out of the vision tower (`saliency`). It knows no method and no particular backbone.
"""
