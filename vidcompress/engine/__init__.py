"""The engine alone moves data: hooks on instances (`hooks`), the reduction of a
prompt (`plan`), masks and positions (`sequence`), a cache that knows two
lengths (`cache`), signals out of the vision tower (`saliency`), a first look (`first_look`), what leaves the cache
between decoding steps (`eviction`). It knows no method and no particular backbone.
"""
