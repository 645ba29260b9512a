"""OpenAI's API over HTTP. Needs the extra `serve`; nothing here is imported before it is used.

llm = AsyncLLM.from_options()
app = build_app(llm, ServerOptions())           # an ASGI application: jaxpaged.server.app
serve(llm, ServerOptions(port=8000))            # the same on a socket, until SIGTERM: jaxpaged.server.run
"""
