"""A page that shows a running server: requests, who owns which page, a few lines over time, and a chat.

`page` makes one document of the files beside it, `live` is what it asks for again and again, `page_map` the map of the pool.
"""
