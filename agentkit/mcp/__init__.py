"""MCP: tools of other people's servers in our agents, and our systems as tools of a server. Needs the extra `mcp`.

A server's tools are denied until somebody grants them one by one, with the permission that person chooses. What was
granted is pinned: a server that later lists another text, schema or hint for the tool is refused. What a tool returns
is data of unknown origin and marked so; nothing in it is executed or fetched.

    everything = Server.stdio("npx", "-y", "@modelcontextprotocol/server-everything")
    with everything:
        for listed in everything.tools():
            print(listed.name, listed.description, listed.hints, listed.findings)
        echo = everything.grant("echo", permission="read")  # a `Tool`, for an agent's `tools`

In a notebook that is released, declare the tool with its pin instead (`agentkit mcp grant` prints that): it connects at
its first call, in whatever process that is. See `tool`. A stdio server is a program that runs with your rights: pin its
version as you would a dependency's.
"""

from agentkit.mcp.granted import RemoteTool, tool
from agentkit.mcp.listing import Listed
from agentkit.mcp.servers import Server
from agentkit.mcp.serving import asgi_app, build_server, serve

__all__ = ["Listed", "RemoteTool", "Server", "asgi_app", "build_server", "serve", "tool"]
