"""Chat templates in the shapes of families of models, short, and conversations with tools; templates that try to get out."""

from __future__ import annotations

CHATML = """\
{% for message in messages %}
    {{-  '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{% else %}{{- 'Be helpful.' }}{% endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{% endfor %}
    {{- "\\n</tools>\\nAnswer with <tool_call></tool_call><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{% endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}{% else %}{{- call.arguments | tojson }}{% endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

LLAMA31 = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{% endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{% endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
    {%- else %}{{- raise_exception("no first user message") }}{% endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer as {"name": name, "parameters": object}.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{% endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one tool-call at once!") }}{% endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{% endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{% endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{% endif %}
                    {%- if not loop.last %}{{- ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{% else %}{{- "]" }}{% endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- set before = system_message + "\\n\\n" if loop.last and system_message is defined else "" %}
        {{- "[INST] " + before + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("ids have 9 characters") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{% else %}{{- "]" + eos_token }}{% endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] in ("tool_results", "tool") %}
        {%- set content = message.content.content if message.content is mapping else message.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""

PARTS = """\
{%- for message in messages %}{% set content = message['content'] %}
    {{- '[' + message.role + ']' }}
    {%- if content is string %}{% generation %}{{ content }}{% endgeneration %}
    {%- else %}{% for part in content %}{% if part.type == 'text' %}{{ part.text | trim }}/{% endif %}{% endfor %}{% endif %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
{%- endfor %}
{{- dict.fromkeys(['a'], 1) | tojson }}{{ dict(b=2) }}{{ namespace(self=3).self }}{{ strftime_now('%Y-%m-%d') }}"""

FAMILIES = {"chatml": CHATML, "qwen2.5": QWEN25, "qwen3": QWEN3, "llama3.1": LLAMA31, "mistral": MISTRAL, "parts": PARTS}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather <now> & "here", in °C 😀',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": 'Zürich "1" <b>'}}}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "hello"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "a <b> \"c\" 'd' 😀\n"}],
    "turns": [{"role": "user", "content": "1"}, {"role": "assistant", "content": " 2 \n"}, {"role": "user", "content": "3"}],
    "called": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 21.5}', "tool_call_id": "abcdefgh1", "name": "get_weather"},
    ],
    "thought": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning": "one and one"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "<think>\nsums\n</think>\n\n4"},
    ],
}

# Refused when a template is loaded: what they are after stands in them.
ESCAPES = """\
{{ ''.__class__ }}
{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ ''['__class__'] }}
{{ ''|attr('__class__') }}
{{ ()|attr('__class__')|attr('__base__')|attr('__subclasses__') }}
{{ [].__class__.__base__ }}
{{ {}.__class__.__bases__[0] }}
{{ (1).__class__ }}
{{ messages.__class__ }}
{{ messages[0].__init__ }}
{{ messages[0]['__init__'].y }}{{ ''.__doc__ }}
{{ cycler.__init__.__globals__.os.popen('id').read() }}
{{ joiner.__init__.__globals__['os'] }}
{{ namespace.__init__.__globals__ }}
{{ lipsum.__globals__['os'].popen('id').read() }}
{{ lipsum['__globals__'] }}
{{ lipsum|attr('__globals__') }}
{{ range.__class__ }}
{{ dict.__class__ }}
{{ dict.__call__.__func__ }}
{{ raise_exception.__globals__ }}
{{ strftime_now.__closure__ }}
{{ strftime_now.__code__ }}
{{ self.__init__ }}
{{ self._TemplateReference__context }}
{{ self.__class__.__init__.__globals__ }}
{{ loop.__class__ }}
{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}
{% for x in [1] %}{{ loop._iterator }}{% endfor %}
{% macro m() %}{% endmacro %}{{ m.__globals__ }}
{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}
{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}
{{ (messages|map('upper')).gi_frame }}
{{ (messages|map('upper')).gi_frame.f_globals }}
{{ (messages|select).gi_code }}
{{ ''.mro }}
{{ x.f_back }}
{{ x.tb_frame.f_builtins }}
{{ messages|map(attribute='__class__')|list }}
{{ messages|selectattr('__class__')|list }}
{{ messages|groupby('__class__') }}
{{ messages|sort(attribute='__class__') }}
{{ messages|sum(attribute='__class__') }}
{{ messages|join(attribute='__class__') }}
{{ '{0.__class__}'.format(1) }}
{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}
{{ '{x.__class__}'.format_map({'x': 1}) }}
{{ ('{0.__class__}'|string).format(1) }}
{% set x = ''.__class__ %}{{ x }}
{% if ''.__class__ %}x{% endif %}
{{ config.__class__.__init__.__globals__['os'] }}
{{ request.application.__globals__.__builtins__.__import__('os') }}
{{ get_flashed_messages.__globals__ }}
{% include '/etc/passwd' %}
{% import '/etc/passwd' as x %}
{% from 'os' import popen %}
{% extends '/etc/passwd' %}
{% include messages[0].content %}""".splitlines()

# Refused when they are reached: what they are after is put together there.
HIDDEN_ESCAPES = """\
{{ ''|attr('__cla' ~ 'ss__') }}
{{ ''['__cla' + 'ss__'] }}
{{ ''['_' * 2 ~ 'class' ~ '_' * 2] }}
{{ cycler['__in' ~ 'it__']['__glo' ~ 'bals__'] }}
{{ lipsum|attr(['__', 'globals', '__']|join)|attr('get') }}
{{ cycler|attr('_' ~ '_init__') }}
{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}
{{ ''|attr('%c%cclass%c%c' % (95, 95, 95, 95)) }}
{{ messages.append(1) }}
{{ messages[0].update(x=1) }}
{{ messages.clear() }}
{{ namespace(_x=1) }}
{{ namespace(**{'_' ~ 'x': 1}) }}
{{ ('{0.__cla' ~ 'ss__}').format(1) }}
{{ messages|map(attribute='__cl' ~ 'ass__')|list }}
{{ dict(messages[0]).pop('role') }}""".splitlines()
