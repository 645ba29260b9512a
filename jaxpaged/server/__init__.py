"""OpenAI's API over HTTP. Needs the extra `serve`; nothing here is imported before it is used.

    llm = AsyncLLM.from_options()
    app = build_app(llm, ServerOptions())           # an ASGI application
    serve(llm, ServerOptions(port=8000))            # or the same on a socket, until SIGTERM

`build_app` is in `jaxpaged.server.app`, `serve` in `jaxpaged.server.run`, `ServerOptions` in `jaxpaged.server.options`.
"""
